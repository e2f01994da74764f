"""The discrete VAE: pictures <-> grids of codes."""
