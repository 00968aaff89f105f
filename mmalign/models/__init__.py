"""What every modality's adapter shares: the Adapter contract, references, LoRA, weight merging."""
