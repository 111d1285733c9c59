"""How rows reach experts. A transport file holds both ends of its wire."""
