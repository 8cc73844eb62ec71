"""Reconstruction: detail planes in whole shards, their pyramids, and the result that decodes ions from them."""
