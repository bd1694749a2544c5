"""A trained model as a folder that others can use, with or without this package."""
