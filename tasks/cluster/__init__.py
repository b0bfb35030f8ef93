"""How many updates a second a cluster does: a model of its costs, fed with measured runs."""
