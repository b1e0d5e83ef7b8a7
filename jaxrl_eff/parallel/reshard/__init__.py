"""Resharding: transfers of arrays between meshes, in full or as changed elements only."""
