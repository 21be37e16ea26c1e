"""The PEFT tuner and layer that carry every adapter method."""
