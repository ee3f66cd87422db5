"""The frozen CLIP: runner against open_clip's own forward, batched Grad-CAM, box masks, affinity algebra, loading."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file

from model.clip import Clip, box_mask, high_order, load_clip, min_max, normalise_affinity, refine, softmax_grad_cam
from model.clip.load import _config, clip_from_state
from model.clip.origin import OPENAI, origin_of
from tests.make import TEXT, VISION, small_clip
from util.config import Config
from util.errors import UserError
from util.run.preflight import clip as preflight_clip


@pytest.fixture(scope="module")
def reference() -> CLIP:
    return small_clip()


@pytest.fixture(scope="module")
def clip(reference: CLIP) -> Clip:
    state = {("text." if not k.startswith(("visual.", "logit")) else "") + k: v for k, v in reference.state_dict().items()}
    return clip_from_state(state).requires_grad_(False)  # open_clip's CustomTextCLIP naming on the way


def test_runner_equals_open_clip(reference: CLIP, clip: Clip) -> None:
    images = torch.rand(2, 3, 64, 64)
    trunk = clip.visual
    tokens, grid = trunk.embed(images)
    assert grid == (4, 4)
    plain = trunk.run(tokens)
    mapped = trunk.run(tokens, keep_hidden=range(4), keep_attention=range(4))
    ours = trunk.post_norm(plain.tokens)[:, 0] @ trunk.visual.proj
    torch.testing.assert_close(ours, reference.encode_image(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.tokens, mapped.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mapped.hidden[3], mapped.tokens)
    torch.testing.assert_close(sum(mapped.attention.values()).sum(-1), torch.full((2, 17), 4.0))


def test_prompts_extra_tokens_and_mask(clip: Clip) -> None:
    """Against every block written out: prompts are new before each, a query reads what its row of the mask allows."""
    torch.manual_seed(0)
    trunk, width = clip.visual, 128
    prompts, extra = torch.randn(4, 1, 3, width), torch.randn(2, width)
    N = 1 + 3 + 2 * 5 + 2
    allowed = (torch.rand(N, N) < 0.5) | torch.eye(N, dtype=torch.bool)
    with torch.no_grad():
        tokens, grid = trunk.embed(torch.randn(1, 3, 32, 80), class_twice=True, extra=extra)
        fused = trunk.run(tokens, prompts=lambda i: prompts[i], allowed=allowed)
        mapped = trunk.run(tokens, prompts=lambda i: prompts[i], allowed=allowed, keep_attention=range(4))
        once, _ = trunk.embed(torch.randn(1, 3, 32, 80))
        x = tokens[0]
        for i, block in enumerate(trunk.blocks):
            x = torch.cat([x[:1], prompts[i, 0], x[1 if i == 0 else 4 :]])
            q, k, v = torch.nn.functional.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, 1)
            heads = []
            for part in range(2):
                at = slice(64 * part, 64 * part + 64)
                scores = (q[:, at] @ k[:, at].T / 8).exp() * allowed
                heads.append(scores / scores.sum(1, keepdim=True) @ v[:, at])
            x = x + block.attn.out_proj(torch.cat(heads, 1))
            x = x + block.mlp(block.ln_2(x))
    assert grid == (2, 5) and tokens.shape == (1, N - 3, width) and once.shape[1] == N - 5
    visual = trunk.visual
    expected = visual.ln_pre(2 * visual.class_embedding + visual.positional_embedding[0])
    torch.testing.assert_close(tokens[0, 0], expected)
    torch.testing.assert_close(tokens[0, -2:], visual.ln_pre(extra))
    for run in (fused, mapped):
        torch.testing.assert_close(run.tokens[0], x, rtol=1e-4, atol=1e-5)
    assert all((m[0][~allowed] == 0).all() for m in mapped.attention.values())


def test_position_on_another_grid_is_bilinear(clip: Clip) -> None:
    table = clip.visual.position((6, 3))
    own = clip.visual.visual.positional_embedding
    assert table.shape == (19, 128)
    torch.testing.assert_close(table[0], own[0])
    # half-pixel bilinear, no antialias: the centre of a 3-wide row sits between columns 1 and 2 of 4
    grid = own[1:].view(4, 4, -1)
    centre = 0.5 * (grid[:, 1] + grid[:, 2])
    torch.testing.assert_close(table[1:].view(6, 3, -1)[0, 1], centre[0])


def cam_inputs(clip: Clip, rows: int = 5) -> dict:
    torch.manual_seed(1)
    tokens, grid = clip.visual.embed(torch.rand(rows, 3, 48, 80))
    tokens = clip.visual.run(tokens, stop=3).tokens.detach()
    candidates = torch.rand(rows, 12) < 0.5
    target = torch.randint(12, (rows,))
    candidates.scatter_(1, target[:, None], True)
    texts = torch.nn.functional.normalize(torch.randn(12, 32), dim=-1)
    return {"tokens": tokens, "grid": grid, "texts": texts, "candidates": candidates, "target": target}


def test_batched_cam_equals_one_by_one(clip: Clip) -> None:
    inputs = cam_inputs(clip)
    batched = softmax_grad_cam(clip.visual, logit_scale=clip.logit_scale, **inputs)
    assert batched.map.shape == (5, 3, 5) and batched.map.amax() > 0.5
    for i in range(5):
        one = {k: v[i : i + 1] if k in ("tokens", "candidates", "target") else v for k, v in inputs.items()}
        single = softmax_grad_cam(clip.visual, logit_scale=clip.logit_scale, **one)
        torch.testing.assert_close(batched.map[i], single.map[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batched.probability[i], single.probability[0], rtol=1e-4, atol=1e-6)
        # the softmax runs over the candidates only
        assert (batched.probability[i][~inputs["candidates"][i]] == 0).all()


def test_cam_weights_are_the_mean_gradient(clip: Clip) -> None:
    """Against finite differences of the probability along each channel of ln_1's output."""
    inputs = cam_inputs(clip, rows=1)
    clip = clip.double()
    try:
        inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        last, trunk = clip.visual.blocks[-1], clip.visual
        tokens = inputs["tokens"].double()
        a = last.ln_1(tokens)

        def probability(a: torch.Tensor) -> torch.Tensor:
            from model.clip.trunk import attend

            z = tokens + attend(last, a)[0]
            z = z + last.mlp(last.ln_2(z))
            image = trunk.post_norm(z)[:, 1:].mean(1) @ trunk.visual.proj
            logits = clip.logit_scale.exp() * torch.nn.functional.normalize(image, dim=-1) @ inputs["texts"].T
            return logits.masked_fill(~inputs["candidates"], float("-inf")).softmax(-1)[0, inputs["target"][0]]

        alpha = torch.zeros(a.shape[2], dtype=torch.float64)
        for c in range(a.shape[2]):
            step = torch.zeros_like(a)
            step[:, 1:, c] = 1e-5  # all patches at once: the derivative is the sum over patches
            alpha[c] = (probability(a + step) - probability(a - step)) / 2e-5 / (a.shape[1] - 1)
        expected = min_max(min_max((a[:, 1:] @ alpha).relu())).view(1, 3, 5).float()
    finally:
        clip = clip.float()
    ours = softmax_grad_cam(clip.visual, logit_scale=clip.logit_scale, **{
        k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()})  # fmt: skip
    torch.testing.assert_close(ours.map, expected, rtol=1e-3, atol=1e-3)


def contour_boxes(cam: np.ndarray, threshold: float) -> np.ndarray:
    """The published routine: OpenCV contours of the thresholded 8-bit map, boxes filled half-open and clipped."""
    level = (255 * cam).astype(np.uint8)
    binary = (level > int(threshold * level.max())).astype(np.uint8)
    mask = np.zeros_like(binary)
    h, w = cam.shape
    for contour in cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]:
        x, y, dx, dy = cv2.boundingRect(contour)
        mask[y : min(y + dy, h - 1), x : min(x + dx, w - 1)] = 1
    return mask.astype(bool)


@pytest.mark.parametrize("threshold", [0.4, 0.7])
def test_box_mask_equals_opencv_contours(threshold: float) -> None:
    rng = np.random.default_rng(0)
    for size in ((7, 9), (16, 16), (24, 31), (1, 5), (33, 12)):
        maps = rng.random((60, *size)) ** rng.uniform(1, 12, (60, 1, 1))
        maps[::7] = cv2.GaussianBlur(maps[::7].transpose(1, 2, 0), (0, 0), 2).reshape(*size, -1).transpose(2, 0, 1)
        maps[0] = 0
        maps[1] = 1
        maps = maps.astype(np.float32)
        ours = box_mask(torch.from_numpy(maps), threshold).numpy()
        for i, cam in enumerate(maps):
            np.testing.assert_array_equal(ours[i], contour_boxes(cam, threshold), err_msg=f"map {i} of {size}")


def test_refinement_equals_the_plain_formula() -> None:
    """Products with the map against the n x n algebra of the paper, column mask and square written out."""
    torch.manual_seed(0)
    attention = (3 * torch.randn(3, 30, 30)).softmax(-1)
    cam = torch.rand(3, 5, 6)
    expected = []
    for m, c in zip(attention, cam, strict=True):
        t = m / m.sum(0, keepdim=True)
        t = t / t.sum(1, keepdim=True)
        t = torch.maximum(t, t @ t.T)
        t = t @ t * box_mask(c[None]).flatten()
        r = t @ c.flatten()
        r = r - r.min()
        expected.append((r / (r.max() + 1e-7)).view(5, 6))
    torch.testing.assert_close(refine(cam, attention), torch.stack(expected), rtol=1e-5, atol=1e-5)
    rows = normalise_affinity(attention, rounds=3).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert (high_order(attention) >= attention).all()


def test_refining_an_empty_map_gives_zero() -> None:
    assert (refine(torch.zeros(1, 4, 4), torch.rand(1, 16, 16)) == 0).all()


def test_text_bank_cache_and_limits(clip: Clip, tmp_path) -> None:
    texts = ["a photo of cat.", "a photo without cat."]
    bank = clip.text.bank(texts, cache=tmp_path)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(clip.text.bank(texts, cache=tmp_path), bank, rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="does not fit"):
        clip.text(["word " * 200])


def test_text_bank_averages_synonyms_and_templates(clip: Clip, tmp_path) -> None:
    """Each text is normalised, then the mean of a class; and a class of two names is not two classes."""
    templates = ["a photo of a {}.", "there is a {} in the scene."]
    bank = clip.text.bank([("cat", "kitten"), "sky"], templates, tmp_path)
    each = clip.text([t.format(n) for n in ("cat", "kitten", "sky") for t in templates])
    expected = torch.stack([each[:4].mean(0), each[4:].mean(0)])
    torch.testing.assert_close(bank, expected / expected.norm(dim=1, keepdim=True))
    assert len(clip.text.bank(["cat", "kitten", "sky"], templates, tmp_path)) == 3
    assert len(clip.text.bank([("cat", "kitten"), "sky"], templates[:1], tmp_path)) == 2
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(UserError, match="class 1 of 2 has no name"):
        clip.text.bank(["cat", []])


def test_tiny_folder_knows_only_its_words(reference: CLIP, tmp_path) -> None:
    ids = torch.tensor(sorted({49406, 49407, *open_clip.SimpleTokenizer().encode("a photo of cat.")}), dtype=torch.int32)
    state = {k: v.clone() for k, v in reference.state_dict().items() if k != "attn_mask"}
    state |= {"token_embedding.rows": state.pop("token_embedding.weight")[ids.long()], "token_embedding.ids": ids}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"embed_dim": 32, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}))
    tiny = load_clip(str(tmp_path))
    tokens = open_clip.SimpleTokenizer()(["a photo of cat."])
    torch.testing.assert_close(tiny.text(["a photo of cat."]), reference.encode_text(tokens, normalize=True))
    with pytest.raises(UserError, match="dog"):
        tiny.text(["a photo of dog."])


def test_wrong_clip_files(reference: CLIP, tmp_path) -> None:
    with pytest.raises(UserError, match="no file .*missing.pt"):
        load_clip(str(tmp_path / "missing.pt"))

    archive = tmp_path / "ViT-B-16.pt"  # a TorchScript archive, but not OpenAI's
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), archive)
    with pytest.raises(UserError, match="sha256"):
        load_clip(str(archive))

    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"text\.pt"):
        load_clip(str(tmp_path / "text.pt"))

    state = dict(reference.state_dict())
    del state["visual.ln_post.weight"]
    torch.save(state, tmp_path / "partial.pt")
    with pytest.raises(UserError, match=r"visual\.ln_post\.weight"):
        load_clip(str(tmp_path / "partial.pt"))

    torch.save({"layer": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no CLIP ViT"):
        load_clip(str(tmp_path / "other.pt"))


# ---- what weights do not say of themselves


def foreign_clip() -> CLIP:
    """GELU, heads 32 wide."""
    torch.manual_seed(3)
    return CLIP(32, CLIPVisionCfg(**VISION, head_width=32), CLIPTextCfg(**TEXT), quick_gelu=False).eval()


def beside(folder: Path, **preprocess: list[float]) -> None:
    model = {"embed_dim": 32, "vision_cfg": {**VISION, "head_width": 32}, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))


@torch.no_grad()
def test_activation_and_heads_come_from_the_config_beside(tmp_path: Path) -> None:
    own, file = foreign_clip(), tmp_path / "open_clip_pytorch_model.bin"
    torch.save(own.state_dict(), file)
    for option, message in (("auto", r"GELU.*hub.*CLIP\.activation=gelu"), ("gelu", "attention heads .* open_clip_config.json")):
        with pytest.raises(UserError, match=message):
            load_clip(str(file), activation=option)
    beside(tmp_path, mean=[0.5, 0.5, 0.5], std=[0.25, 0.5, 0.5])
    words, image = ["a photo of a dog"], torch.randint(0, 256, (1, 3, 64, 64))
    for source in (file, tmp_path):
        clip = load_clip(str(source))
        torch.testing.assert_close(clip.text(words), own.encode_text(open_clip.tokenize(words), normalize=True))
        normalised = clip.visual.normalise(image)
        torch.testing.assert_close(normalised[:, 0], (image[:, 0] / 255 - 0.5) / 0.25)
        ours = clip.visual.post_norm(clip.visual.run(clip.visual.embed(normalised)[0]).tokens)[:, 0] @ clip.visual.visual.proj
        torch.testing.assert_close(ours, own.encode_image(normalised), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="CLIP.activation = quick_gelu, but .* gelu"):
        load_clip(str(file), activation="quick_gelu")
    for text, message in (("[]", "no config of open_clip"), ("{}", "model_cfg"),
                          (json.dumps({"model_cfg": {"vision_cfg": {"timm_model_name": "x"}}}), "timm_model_name")):  # fmt: skip
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_clip(str(file))


@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-L-14-336"])
def test_sizes_of_a_listed_model_say_its_heads(name: str) -> None:
    model = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = CLIP(model["embed_dim"], CLIPVisionCfg(**model["vision_cfg"]), CLIPTextCfg(**model["text_cfg"])).state_dict()
    built = _config(state, OPENAI)
    wanted = {"head_width": 64, "mlp_ratio": 4.0, **model["vision_cfg"]}
    assert {"head_width": 64, "mlp_ratio": 4.0, **built["vision_cfg"]} == wanted
    assert built["text_cfg"] == model["text_cfg"]


def test_known_files_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: CLIP) -> None:
    """By sha256, by name, by OpenAI's metadata; two that contradict each other are reported."""
    def there(name: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"weights")
        return tmp_path / name

    assert origin_of(there("own.bin"), {}).quick_gelu is None
    assert origin_of(there("models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K/snapshots/1f/model.bin"), {}).quick_gelu is False
    assert origin_of(there("CLIP-ViT-L-14-laion2B-s32B-b82K/model.bin"), {}).statistics == ((0.5,) * 3, (0.5,) * 3)
    assert origin_of(there("b16_400m.pt"), {}).quick_gelu is True
    with pytest.warns(UserWarning, match="sha256 is not.* gelu"):
        assert origin_of(there("vit_b_16-laion400m_e32-55e67d44.pt"), {}).quick_gelu is False
    digest = hashlib.sha256(b"weights").hexdigest()
    for url in (f"https://x/{digest}/ViT.pt", f"https://x/vit-{digest[:8]}.pt"):
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag, url=url: {"url": url, "quick_gelu": True})
        assert origin_of(tmp_path / "own.bin", {}).quick_gelu is True

    torch.save({**reference.state_dict(), "input_resolution": torch.tensor(64), "context_length": torch.tensor(77),
                "vocab_size": torch.tensor(49408)}, tmp_path / "openai.pt")  # fmt: skip
    ours = load_clip(str(tmp_path / "openai.pt")).text(["a cat"])
    torch.testing.assert_close(ours, reference.encode_text(open_clip.tokenize(["a cat"]), normalize=True))


def test_transformers_models_are_named(tmp_path: Path) -> None:
    state = {"vision_model.embeddings.class_embedding": torch.zeros(8), "text_model.final_layer_norm.weight": torch.zeros(8)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match="transformers library.*hf-hub:"):
            load_clip(str(source))


@pytest.mark.parametrize(("name", "message"), [
    ("ViT-B-16/openai", "trained with quick_gelu.* write CLIP.clip_path=ViT-B-16-quickgelu/openai"),
    ("ViT-L-14-quickgelu/laion2b_s32b_b82k", "trained with gelu.* write CLIP.clip_path=ViT-L-14/laion2b_s32b_b82k"),
])  # fmt: skip
def test_hub_names_of_another_activation_are_refused_before_the_download(name: str, message: str, monkeypatch) -> None:
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(UserError, match=message):
        load_clip(name)


def test_home_is_expanded_alike_by_check_and_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my").symlink_to(Path(__file__).parents[1] / "demo/clip")
    config = Config()
    for name, there in (("~/my", True), ("~/other.pt", False), ("~nobody-of-this-name/my", False)):
        config.CLIP.clip_path = name
        assert preflight_clip(config).ok == there
        if there:
            load_clip(name)
        else:
            with pytest.raises(UserError, match="no file ~"):
                load_clip(name)


def test_a_text_bank_of_another_activation_is_not_taken(tmp_path: Path, reference: CLIP) -> None:
    state = reference.state_dict()
    quick, plain = clip_from_state(state), clip_from_state(state, origin=replace(OPENAI, quick_gelu=False))
    assert not torch.equal(quick.text.bank(["a cat"], cache=tmp_path), plain.text.bank(["a cat"], cache=tmp_path))
    assert quick.settings != plain.settings
