"""The embedded world: small scenes of named things and a tiny CLIP that knows them, so that everything runs offline."""

from util.config import Config
from util.run.distributed import Context


def prepare_data(config: Config, context: Context) -> None:
    """Makes the demo world where the config asks for it and it is missing: rank 0 draws, the others wait."""
    if config.Train.data_set == "demo" and context.main:
        from demo.world import ensure  # here, so that `python -m demo.world` is not imported twice

        ensure(config.Data.data_root)
    context.barrier()
