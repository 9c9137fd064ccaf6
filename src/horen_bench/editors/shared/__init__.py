"""What methods of several families read of a model as received: general text and its second moments."""
