"""The machinery behind the layer: every way to run the loop, and the choice between them."""
