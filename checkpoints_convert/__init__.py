"""HF checkpoints in and out of Megatron-Core models: straight into each rank's shard, and back to the bit."""
