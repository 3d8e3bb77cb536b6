"""A run's model for other programs: dense weights, sparse weights, ONNX; each read back and compared before it counts."""

SUFFIXES = {"dense": ".pt", "sparse": ".safetensors", "onnx": ".onnx"}  # the formats
WHICH = ("last", "best", "ema")  # weights: newest; of the best test accuracy; newest moving average
