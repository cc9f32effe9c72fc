"""What trainer and service both need. Imports from neither of them."""
