"""One op a file: equation, reference, kernels, launchers, autograd, public function."""
