"""Tokenizes texts into token stores: arrays of token ids on disk, checked for duplicates and evaluation text."""
