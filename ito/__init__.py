"""ITO: train image–text dual encoders with multi-view alignment and a training-only fusion."""
