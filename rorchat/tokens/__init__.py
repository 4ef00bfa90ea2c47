"""TOKENS: text -> shards -> mixture -> rows."""
