"""What a person does with deliveries: look at dead letters, redrive or discard them."""
