"""A Copilot beside a pretrained Pilot: does it add what the same time spent on the Pilot alone does not?"""
