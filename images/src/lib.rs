//! Images of Mote: what a guest boots from, how it is recognised, kept and made.
//!
//! - [`store`]: the content-addressed directory that the controller keeps uploads in and a host keeps its cache in.
//! - [`digest`]: the digests that Glance and the store speak (SHA-256 names, MD5 and SHA-512 for the API).
//! - [`format`]: what a file is by its content, and whether that is what its owner declared.
//! - [`qcow2`]: raw disks made of qcow2 disks, which are hostile until they were read.
//! - [`samples`]: small files of the formats, for tests.
//! - [`kernel`]: whether a file is an x86-64 kernel that the VMM can start.
//! - [`disk`]: a server's own disk from an image, sharing or skipping what it can.
//! - [`build`]: guest images made on this machine from Debian packages.
//! - [`build_kernel`]: a kernel for microVMs from Debian's source package.
//!
//! Everything here is synchronous: asynchronous programs call it inside `spawn_blocking`. Content is hostile until it
//! was checked: nothing in this crate panics on, or grows with, the bytes that it reads.

pub mod build;
pub mod build_kernel;
pub mod digest;
pub mod disk;
pub mod format;
pub mod kernel;
mod kernel_payload;
mod making;
pub mod qcow2;
pub mod samples;
pub mod store;

pub use digest::Digest;
pub use format::Format;
pub use store::Store;
