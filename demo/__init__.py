"""The embedded world: small scenes of named things and a tiny CLIP that knows them, so that everything runs offline."""
