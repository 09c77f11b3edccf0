"""Prepared data: `prepare` writes it, `shards` opens it, `loader` draws batches from it."""
