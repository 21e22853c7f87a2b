"""GatherColumns (of our own): columns of a product's weight, for tables that a model multiplies with too."""
