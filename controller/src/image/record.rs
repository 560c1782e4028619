//! The stored image and how Glance shows it.

use crate::db::{Conn, Db};
use std::collections::{BTreeMap, BTreeSet};

use mote_images::Digest;
use serde_json::{Map, Value, json};

use super::not_found;
use crate::{
    db,
    http::{context::Ctx, error::ApiError},
};

/// Row of `images`.
#[derive(Debug, Clone, sqlx::FromRow)]
struct ImageRow {
    id: String,
    owner: String,
    name: Option<String>,
    status: String,
    visibility: String,
    protected: bool,
    hidden: bool,
    disk_format: Option<String>,
    container_format: Option<String>,
    min_disk_gib: i64,
    min_ram_mib: i64,
    size: Option<i64>,
    sha256: Option<String>,
    sha512: Option<String>,
    md5: Option<String>,
    import_state: Option<String>,
    raw_sha256: Option<String>,
    virtual_size: Option<i64>,
    created_us: i64,
    updated_us: i64,
}

/// State of an image, see the drawing in [`super`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Without bytes.
    Queued,
    /// Bytes are staged (or on their way there) for an import.
    Uploading,
    /// Bytes are being imported.
    Importing,
    /// Bytes are coming.
    Saving,
    /// With bytes.
    Active,
    /// With bytes that only administrators get.
    Deactivated,
}

impl Status {
    /// Glance's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Uploading => "uploading",
            Self::Importing => "importing",
            Self::Saving => "saving",
            Self::Active => "active",
            Self::Deactivated => "deactivated",
        }
    }

    /// What the column `status` says; `import_state` says the rest.
    fn stored(self) -> &'static str {
        match self {
            Self::Uploading => Self::Queued.as_str(),
            Self::Importing => Self::Saving.as_str(),
            other => other.as_str(),
        }
    }

    fn parse(word: &str, import_state: Option<&str>) -> Self {
        match import_state.unwrap_or(word) {
            "uploading" => Self::Uploading,
            "importing" => Self::Importing,
            "saving" => Self::Saving,
            "active" => Self::Active,
            "deactivated" => Self::Deactivated,
            _ => Self::Queued,
        }
    }
}

/// What is known of the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Bytes, as they were sent.
    pub size: u64,
    /// SHA-256 (hex) and bytes of what hosts read: for most formats the content itself.
    pub boot: (String, u64),
    /// Hex; the name in the store.
    pub sha256: String,
    /// Hex; Glance's `os_hash_value`.
    pub sha512: String,
    /// Hex; Glance's `checksum`.
    pub md5: String,
}

/// An image.
#[derive(Debug, Clone)]
pub struct Image {
    /// UUID.
    pub id: String,
    /// Project.
    pub owner: String,
    /// Name, not unique.
    pub name: Option<String>,
    /// State.
    pub status: Status,
    /// `public`, `community`, `shared`, `private`.
    pub visibility: String,
    /// Can't be deleted.
    pub protected: bool,
    /// Not in lists.
    pub hidden: bool,
    /// `raw`, `qcow2`, `iso`, `aki`, `ari`.
    pub disk_format: Option<String>,
    /// `bare`, `aki`, `ari`.
    pub container_format: Option<String>,
    /// GiB.
    pub min_disk_gib: i64,
    /// MiB.
    pub min_ram_mib: i64,
    /// Once the bytes are there.
    pub content: Option<Content>,
    /// SHA-256 (hex) of bytes that wait for their import.
    pub staged: Option<String>,
    /// The owner's own.
    pub properties: BTreeMap<String, String>,
    /// Tags.
    pub tags: BTreeSet<String>,
    /// µs since 1970.
    pub created_us: i64,
    /// µs since 1970.
    pub updated_us: i64,
}

impl Image {
    fn from_row(row: ImageRow) -> Self {
        let bytes = |number: i64| u64::try_from(number).unwrap_or(0);
        let status = Status::parse(&row.status, row.import_state.as_deref());
        let is_staged = !matches!(status, Status::Active | Status::Deactivated);
        let staged = row.sha256.clone().filter(|_| is_staged);
        let content = match (row.size, row.sha256, row.sha512, row.md5) {
            (Some(size), Some(sha256), Some(sha512), Some(md5)) if !is_staged => {
                let boot = row.raw_sha256.unwrap_or_else(|| sha256.clone());
                let boot = (boot, bytes(row.virtual_size.unwrap_or(size)));
                Some(Content { size: bytes(size), boot, sha256, sha512, md5 })
            }
            _ => None,
        };
        Self {
            id: row.id,
            owner: row.owner,
            name: row.name,
            status,
            visibility: row.visibility,
            protected: row.protected,
            hidden: row.hidden,
            disk_format: row.disk_format,
            container_format: row.container_format,
            min_disk_gib: row.min_disk_gib,
            min_ram_mib: row.min_ram_mib,
            content,
            staged,
            properties: BTreeMap::new(),
            tags: BTreeSet::new(),
            created_us: row.created_us,
            updated_us: row.updated_us,
        }
    }

    /// SHA-256 (hex) of all bytes that it needs.
    pub fn digests(&self) -> Vec<String> {
        let content = self.content.iter().flat_map(|content| [&content.sha256, &content.boot.0]);
        content.chain(&self.staged).cloned().collect()
    }

    /// As Glance shows it: the owner's properties beside the others.
    pub fn json(&self) -> Value {
        let mut image: Map<String, Value> =
            self.properties.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        let content = self.content.as_ref();
        let own = json!({
            "id": self.id,
            "name": self.name,
            "owner": self.owner,
            "status": self.status.as_str(),
            "visibility": self.visibility,
            "protected": self.protected,
            "os_hidden": self.hidden,
            "disk_format": self.disk_format,
            "container_format": self.container_format,
            "min_disk": self.min_disk_gib,
            "min_ram": self.min_ram_mib,
            "size": content.map(|c| c.size),
            "virtual_size": content.map(|c| c.boot.1),
            "checksum": content.map(|c| &c.md5),
            "os_hash_algo": content.map(|_| "sha512"),
            "os_hash_value": content.map(|c| &c.sha512),
            "tags": self.tags,
            "created_at": db::rfc3339_s(self.created_us),
            "updated_at": db::rfc3339_s(self.updated_us),
            "self": format!("/v2/images/{}", self.id),
            "file": format!("/v2/images/{}/file", self.id),
            "schema": "/v2/schemas/image",
        });
        if let Value::Object(own) = own {
            image.extend(own);
        }
        Value::Object(image)
    }
}

/// The image, if the asker may see it; 404 otherwise.
///
/// # Errors
/// 404.
pub async fn find(conn: &mut Conn, id: &str, ctx: &Ctx) -> Result<Image, ApiError> {
    let row: ImageRow = sqlx::query_as(
        "SELECT i.* FROM images i WHERE i.id = $1
         AND ($2 OR i.visibility IN ('public', 'community') OR i.owner = $3
              OR (i.visibility = 'shared' AND EXISTS (
                  SELECT 1 FROM image_members m WHERE m.image_id = i.id AND m.member_id = $3)))",
    )
    .bind(id)
    .bind(ctx.is_admin)
    .bind(ctx.project_id.as_deref())
    .fetch_optional(&mut *conn)
    .await?
    .ok_or_else(|| not_found(id))?;
    let mut images = vec![Image::from_row(row)];
    load_details(conn, &mut images).await?;
    images.pop().ok_or_else(|| not_found(id))
}

/// What is known of bytes that wait for their import.
///
/// # Errors
/// Of the database.
pub async fn staged(conn: &mut Conn, id: &str) -> Result<Digest, ApiError> {
    let (size, sha256, sha512, md5): (i64, String, String, String) =
        sqlx::query_as("SELECT size, sha256, sha512, md5 FROM images WHERE id = $1")
            .bind(id)
            .fetch_one(conn)
            .await?;
    Ok(Digest { sha256, md5, sha512, size: u64::try_from(size).map_err(ApiError::internal)? })
}

/// Runs a query for whole rows of `images` and adds properties and tags.
///
/// # Errors
/// Of the database.
pub async fn fetch(conn: &mut Conn, mut query: sqlx::QueryBuilder<Db>) -> Result<Vec<Image>, sqlx::Error> {
    let rows: Vec<ImageRow> = query.build_query_as().fetch_all(&mut *conn).await?;
    let mut images: Vec<Image> = rows.into_iter().map(Image::from_row).collect();
    load_details(conn, &mut images).await?;
    Ok(images)
}

async fn load_details(conn: &mut Conn, images: &mut [Image]) -> Result<(), sqlx::Error> {
    if images.is_empty() {
        return Ok(());
    }
    let of_these = |start: &'static str| {
        let mut query = sqlx::QueryBuilder::<Db>::new(start);
        let mut ids = query.separated(", ");
        for image in images.iter() {
            ids.push_bind(image.id.clone());
        }
        query.push(")");
        query
    };
    let mut query = of_these("SELECT image_id, name, value FROM image_properties WHERE image_id IN (");
    let properties: Vec<(String, String, String)> = query.build_query_as().fetch_all(&mut *conn).await?;
    let mut query = of_these("SELECT image_id, tag FROM image_tags WHERE image_id IN (");
    let tags: Vec<(String, String)> = query.build_query_as().fetch_all(&mut *conn).await?;
    let places: BTreeMap<String, usize> =
        images.iter().enumerate().map(|(n, image)| (image.id.clone(), n)).collect();
    for (id, name, value) in properties {
        if let Some(&place) = places.get(&id) {
            images[place].properties.insert(name, value);
        }
    }
    for (id, tag) in tags {
        if let Some(&place) = places.get(&id) {
            images[place].tags.insert(tag);
        }
    }
    Ok(())
}

/// Writes a new image.
///
/// # Errors
/// Of the database; a unique violation if the id is taken.
pub async fn insert(conn: &mut Conn, image: &Image) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO images (id, owner, name, status, visibility, protected, hidden, disk_format, container_format,
                             min_disk_gib, min_ram_mib, created_us, updated_us)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $12)",
    )
    .bind(&image.id)
    .bind(&image.owner)
    .bind(&image.name)
    .bind(image.status.stored())
    .bind(&image.visibility)
    .bind(image.protected)
    .bind(image.hidden)
    .bind(&image.disk_format)
    .bind(&image.container_format)
    .bind(image.min_disk_gib)
    .bind(image.min_ram_mib)
    .bind(image.created_us)
    .execute(&mut *conn)
    .await?;
    insert_details(conn, image).await
}

/// Writes what a user may change.
///
/// # Errors
/// Of the database.
pub async fn update(conn: &mut Conn, image: &mut Image) -> Result<(), sqlx::Error> {
    image.updated_us = db::now_us();
    sqlx::query(
        "UPDATE images SET owner = $2, name = $3, visibility = $4, protected = $5, hidden = $6, disk_format = $7,
             container_format = $8, min_disk_gib = $9, min_ram_mib = $10, status = $11, updated_us = $12
         WHERE id = $1",
    )
    .bind(&image.id)
    .bind(&image.owner)
    .bind(&image.name)
    .bind(&image.visibility)
    .bind(image.protected)
    .bind(image.hidden)
    .bind(&image.disk_format)
    .bind(&image.container_format)
    .bind(image.min_disk_gib)
    .bind(image.min_ram_mib)
    .bind(image.status.stored())
    .bind(image.updated_us)
    .execute(&mut *conn)
    .await?;
    sqlx::query("DELETE FROM image_properties WHERE image_id = $1")
        .bind(&image.id)
        .execute(&mut *conn)
        .await?;
    sqlx::query("DELETE FROM image_tags WHERE image_id = $1").bind(&image.id).execute(&mut *conn).await?;
    insert_details(conn, image).await
}

async fn insert_details(conn: &mut Conn, image: &Image) -> Result<(), sqlx::Error> {
    for (name, value) in &image.properties {
        sqlx::query("INSERT INTO image_properties (image_id, name, value) VALUES ($1, $2, $3)")
            .bind(&image.id)
            .bind(name)
            .bind(value)
            .execute(&mut *conn)
            .await?;
    }
    for tag in &image.tags {
        sqlx::query("INSERT INTO image_tags (image_id, tag) VALUES ($1, $2)")
            .bind(&image.id)
            .bind(tag)
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}
