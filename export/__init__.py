"""How a model is written down for other runtimes. Imports loaders, never edge."""
