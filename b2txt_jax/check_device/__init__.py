"""The checks of `b2txt check-device`: numbers and times of the device at hand."""
