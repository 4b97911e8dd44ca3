"""Tables and figures that train several models and compare them."""
