//! `mote image`.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;

use crate::{
    Global,
    client::{Client, Service},
    output,
};

/// Images: list, upload, build.
#[derive(Subcommand)]
pub enum ImageCommand {
    /// List images.
    List,
    /// Show one image.
    Show {
        /// Name or id.
        image: String,
    },
    /// Upload a file as an image.
    Create(CreateArgs),
    /// Make a small Debian image on this machine (arguments go to `mote-image build-debian`; --help tells them).
    #[command(disable_help_flag = true)]
    BuildDebian(BuildArgs),
    /// Make a kernel for microVMs on this machine (arguments go to `mote-image build-kernel`; --help tells them).
    #[command(disable_help_flag = true)]
    BuildKernel(BuildArgs),
    /// Delete images.
    Delete {
        /// Names or ids.
        #[arg(required = true)]
        images: Vec<String>,
    },
}

/// What the program that builds is given.
#[derive(Args)]
pub struct BuildArgs {
    /// Its arguments.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
    arguments: Vec<String>,
}

/// What an image is made of.
#[derive(Args)]
pub struct CreateArgs {
    /// Name.
    name: String,
    /// The file.
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// `raw`, `qcow2` or `iso` (a disk), `aki` (a kernel: vmlinux or bzImage) or `ari` (an initial ramdisk).
    #[arg(long, default_value = "raw")]
    disk_format: String,
    /// For a disk: file of the kernel that boots it, uploaded as an image of its own. Not needed for a whole disk that
    /// brings its own.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// For a disk: file of the initial ramdisk, uploaded as an image of its own.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    ramdisk: Option<PathBuf>,
    /// Property, such as os_command_line=console=ttyS0.
    #[arg(long = "property", value_name = "KEY=VALUE")]
    properties: Vec<String>,
    /// Visible to every project (administrators).
    #[arg(long)]
    public: bool,
}

/// `mote image …`.
pub async fn run(global: &Global, command: ImageCommand) -> anyhow::Result<()> {
    match &command {
        ImageCommand::BuildDebian(args) => return build("build-debian", args),
        ImageCommand::BuildKernel(args) => return build("build-kernel", args),
        _ => {}
    }
    let client = Client::connect(&global.state_dir).await?;
    match command {
        ImageCommand::BuildDebian(_) | ImageCommand::BuildKernel(_) => {}
        ImageCommand::List => {
            let rows = client.list(Service::Image, "/v2/images?limit=1000", "images").await?;
            let columns = [
                ("ID", "id"),
                ("NAME", "name"),
                ("STATUS", "status"),
                ("FORMAT", "disk_format"),
                ("SIZE", "size"),
                ("VISIBILITY", "visibility"),
            ];
            output::list(global.json, &rows, &columns);
        }
        ImageCommand::Show { image } => output::show(global.json, &resolve(&client, &image).await?),
        ImageCommand::Create(args) => output::show(global.json, &create(&client, &args).await?),
        ImageCommand::Delete { images } => {
            for image in images {
                let id = resolve(&client, &image).await?["id"].as_str().unwrap_or_default().to_owned();
                client.delete(Service::Image, &format!("/v2/images/{id}")).await?;
            }
        }
    }
    Ok(())
}

/// Building needs no cloud: becomes `mote-image`.
fn build(what: &str, args: &BuildArgs) -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt as _;
    let program = crate::up::program("mote-image")?;
    let error = std::process::Command::new(&program).arg(what).args(&args.arguments).exec();
    Err(error).with_context(|| format!("running {}", program.display()))
}

async fn resolve(client: &Client, image: &str) -> anyhow::Result<Value> {
    client.resolve(Service::Image, "/v2/images?limit=1000", "images", image).await
}

/// Uploads kernel and ramdisk first, then the disk that names them. What was made is removed when a later part fails.
async fn create(client: &Client, args: &CreateArgs) -> anyhow::Result<Value> {
    let mut properties = serde_json::Map::new();
    for property in &args.properties {
        let (key, value) =
            property.split_once('=').with_context(|| format!("--property {property:?} is not KEY=VALUE"))?;
        properties.insert(key.to_owned(), json!(value));
    }
    let visibility = if args.public { "public" } else { "private" };
    let mut made = Vec::new();
    let outcome = async {
        for (file, format, key) in [(&args.kernel, "aki", "kernel_id"), (&args.ramdisk, "ari", "ramdisk_id")] {
            let Some(file) = file else { continue };
            let name = format!("{}-{}", args.name, key.trim_end_matches("_id"));
            let body = json!({"name": name, "disk_format": format, "container_format": format, "visibility": visibility});
            let image = upload(client, body, file, &mut made).await?;
            properties.insert(key.to_owned(), image["id"].clone());
        }
        // Amazon's kernels and ramdisks are containers of themselves.
        let container = match args.disk_format.as_str() {
            same @ ("aki" | "ari") => same,
            _ => "bare",
        };
        let mut body = json!({"name": args.name, "disk_format": args.disk_format, "container_format": container,
                              "visibility": visibility});
        for (key, value) in std::mem::take(&mut properties) {
            body[key] = value;
        }
        upload(client, body, &args.file, &mut made).await
    }
    .await;
    if outcome.is_err() {
        for id in made {
            client.delete(Service::Image, &format!("/v2/images/{id}")).await?;
        }
    }
    outcome
}

/// Makes an image record and sends its bytes.
async fn upload(client: &Client, body: Value, file: &Path, made: &mut Vec<String>) -> anyhow::Result<Value> {
    let handle = tokio::fs::File::open(file).await.with_context(|| format!("opening {}", file.display()))?;
    let size = handle.metadata().await.with_context(|| format!("reading {}", file.display()))?.len();
    if size == 0 {
        bail!("{} is empty", file.display());
    }
    let image = client.post(Service::Image, "/v2/images", body).await?;
    let id = image["id"].as_str().context("the answer has no id")?.to_owned();
    made.push(id.clone());
    let bar = output::byte_bar(size, format!("uploading {}", image["name"].as_str().unwrap_or("")));
    let progress = bar.clone();
    let stream = ReaderStream::with_capacity(handle, 1 << 20).inspect(move |chunk| {
        progress.inc(chunk.as_ref().map_or(0, |c| c.len() as u64));
    });
    let request = client
        .request(Method::PUT, Service::Image, &format!("/v2/images/{id}/file"))?
        .header("Content-Type", "application/octet-stream")
        .body(reqwest::Body::wrap_stream(stream));
    client.send(request).await.with_context(|| format!("uploading {}", file.display()))?;
    bar.finish_and_clear();
    client.get(Service::Image, &format!("/v2/images/{id}")).await
}
