"""The whole of it under load and under attack, for as long as one likes: what was lost, repeated, out of order?"""
