"""Layers of the supported models; attention itself lives in `model_executor.attention`."""
