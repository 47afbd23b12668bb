"""Growth: what each tensor of a wider or deeper model holds, by its axes and the streams it stands
between.
"""
