"""Names of the bits in control registers.

Mirrors Intel SDM vol. 3A, 2.5 (Control Registers), 2.2.1 (EFER). EFLAGS is in `flags.py`; model-specific registers are
in `msr.py`.
"""

# CR0
CR0_PE = 1 << 0  # protected mode
CR0_MP, CR0_EM, CR0_TS = 1 << 1, 1 << 2, 1 << 3  # x87: monitor, emulate, task switched
CR0_ET = 1 << 4  # always 1
CR0_NE = 1 << 5
CR0_WP = 1 << 16  # the supervisor, too, heeds R/W = 0
CR0_AM = 1 << 18
CR0_NW, CR0_CD = 1 << 29, 1 << 30  # caching
CR0_PG = 1 << 31  # paging
CR0_DEFINED = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG

# CR4
CR4_TSD = 1 << 2  # RDTSC for the supervisor only
CR4_DE = 1 << 3  # breakpoints on ports
CR4_PSE = 1 << 4  # 4-MByte pages
CR4_PAE = 1 << 5  # entries of 8 bytes
CR4_PGE = 1 << 7  # global pages
CR4_PCE = 1 << 8  # RDPMC at every level
CR4_OSFXSR = 1 << 9  # the kernel saves XMM registers, so they may be used
CR4_OSXMMEXCPT = 1 << 10  # the kernel handles #XM
CR4_UMIP = 1 << 11  # SGDT, SIDT, SLDT, SMSW and STR for level 0 only
CR4_FSGSBASE = 1 << 16  # RDFSBASE, WRGSBASE ...
CR4_SMEP = 1 << 20  # the supervisor does not execute user pages
CR4_SMAP = 1 << 21  # nor touch them, unless EFLAGS.AC is set

# EFER
EFER_SCE = 1 << 0  # SYSCALL and SYSRET
EFER_LME = 1 << 8  # long mode wanted
EFER_LMA = 1 << 10  # long mode active: wanted, and paging is on
EFER_NXE = 1 << 11  # execute disable
