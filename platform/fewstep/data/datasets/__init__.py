"""The datasets that fewstep knows how to make: emoji with captions, and Fashion-MNIST with classes."""
