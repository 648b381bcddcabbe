"""What others deliver the same with, written as their own users would, under the same work and the same faults."""
