"""The Mistake Log as a product: which rows and tokens the Pilot never learnt, on a page."""
