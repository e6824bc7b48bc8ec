"""From text to statistics of the inputs and output gradients of linears."""
