"""Segment register instructions (Intel SDM vol. 1, 5.1.12): a pointer's offset and selector, loaded together."""

from __future__ import annotations

from mini_bhyve import segmentation as seg
from mini_bhyve.instructions.definition import instruction


def _define_load_far_pointer(name, index):
    @instruction(name, encoded=True, ends_block=True, data_decides=True)
    def load_far_pointer(cpu, encoding, dst, pointer):
        """LDS, LES, LFS, LGS, LSS: the offset comes first in memory, the selector behind it."""
        width = encoding.operand_width
        offset = pointer.at(0, width).value
        selector = pointer.at(width // 8, 16).value
        cpu.load_segment(index, selector)
        dst.value = offset


for _name, _index in (("lds", seg.DS), ("les", seg.ES), ("lfs", seg.FS), ("lgs", seg.GS), ("lss", seg.SS_)):
    _define_load_far_pointer(_name, _index)
