from breaks import Break

BREAKS: tuple[Break, ...] = ()
