"""Layers of a transformer: they name logical axes and know nothing of processes, meshes, configs or files."""
