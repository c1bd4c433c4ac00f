"""Plans of jobs on clusters that are not here: memory, traffic and step time, without a GPU or a process group."""
