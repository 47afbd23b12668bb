"""Growth operators beside training from scratch: the same budget, data and seeds; loss against FLOPs and seconds."""
