"""Executors of an exported model behind one small interface."""
