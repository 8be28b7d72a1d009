"""What tests share: inputs, comparisons, networks, stand-ins, and machines that are not at hand."""
