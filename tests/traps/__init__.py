"""Every row of docs/traps.md: plain PEFT falls in, lorabench does not."""
