"""A recording day is added to a trained model, and a model follows the signals as it decodes."""
