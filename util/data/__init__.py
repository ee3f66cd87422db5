"""From files on disk to a batch: folds -> index -> episodes (or semantic) -> transforms."""
