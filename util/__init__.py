"""What every system shares: config, data, checkpoints, metrics, logs. Never imports `model`."""
