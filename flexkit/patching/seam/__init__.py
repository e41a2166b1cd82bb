"""Where flexkit meets transformers: its attention, its decoders, its projections. Nothing here knows a call."""
