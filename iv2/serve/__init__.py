"""Embedding and searching folders of video."""
