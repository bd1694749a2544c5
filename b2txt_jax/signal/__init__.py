"""Processing of features on the device before the model: augmentation, smoothing."""
