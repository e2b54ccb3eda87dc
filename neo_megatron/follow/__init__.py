"""`neo-megatron follow`: exports and evaluates every checkpoint of a run while it trains."""
