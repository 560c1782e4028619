//! The heap: power-of-two blocks with a free list for each size. Never used by interrupt code.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{NonNull, null_mut};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

const SMALLEST: usize = 16;
const CLASSES: usize = 20;

struct State {
    next: usize,
    end: usize,
    free: [*mut u8; CLASSES],
}

/// The guest's allocator; empty until [`Heap::give`].
pub struct Heap(UnsafeCell<State>);

// SAFETY: the guest has one thread, and interrupt stubs don't allocate.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(State { next: 0, end: 0, free: [null_mut(); CLASSES] }));

/// Gives the heap its memory.
///
/// # Safety
/// `start..end` is mapped RAM that nothing else uses, now or later. Called once.
pub unsafe fn give(start: usize, end: usize) {
    // SAFETY: one thread; no reference to the state outlives a call.
    let state = unsafe { &mut *HEAP.0.get() };
    (state.next, state.end) = (start, end);
}

fn class_of(layout: Layout) -> usize {
    let size = layout.size().max(layout.align()).max(SMALLEST).next_power_of_two();
    (size / SMALLEST).trailing_zeros() as usize
}

// SAFETY: blocks are disjoint: each is cut once from the range given, aligned to its own size, and afterwards is either
// in use or on the list of its class.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread; no reference to the state outlives a call.
        let state = unsafe { &mut *self.0.get() };
        let class = class_of(layout);
        if class >= CLASSES {
            return null_mut();
        }
        let head = state.free[class];
        if !head.is_null() {
            // SAFETY: a block on a list holds the pointer to the next one.
            state.free[class] = unsafe { head.cast::<*mut u8>().read() };
            return head;
        }
        let size = SMALLEST << class;
        let start = state.next.next_multiple_of(size);
        if start + size > state.end {
            return null_mut();
        }
        state.next = start + size;
        start as *mut u8
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`; the caller gives the block back, and it is large enough for a pointer.
        unsafe {
            let state = &mut *self.0.get();
            let class = class_of(layout);
            pointer.cast::<*mut u8>().write(state.free[class]);
            state.free[class] = pointer;
        }
    }
}

/// What virtio-drivers asks of the platform: memory is identity-mapped and devices see all of it.
pub struct Identity;

fn dma_layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).expect("a page count of a queue")
}

// SAFETY: `dma_alloc` hands out zeroed, page-aligned heap blocks; physical and virtual addresses are the same.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the layout is not empty, since queues have pages.
        let pointer = unsafe { alloc::alloc::alloc_zeroed(dma_layout(pages)) };
        (pointer as PhysAddr, NonNull::new(pointer).expect("out of memory for DMA"))
    }

    unsafe fn dma_dealloc(_paddr: PhysAddr, vaddr: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller gives back what `dma_alloc` gave for the same number of pages.
        unsafe { alloc::alloc::dealloc(vaddr.as_ptr(), dma_layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        NonNull::new(paddr as *mut u8).expect("a BAR at zero")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr() as *mut u8 as PhysAddr
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
