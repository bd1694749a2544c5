"""What is done to features on the device before the model: augmentation, smoothing."""
