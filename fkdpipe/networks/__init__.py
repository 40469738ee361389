"""Models, weight files, teachers and the feature layers that are read from them."""
